# Sourced by try.sh and test.sh: a virtual environment in .venv with this project and the extras named in $1.
#
# PYTHON  the interpreter to start from (python3);  TORCH  what to ask pip for (torch==2.13.0)

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
. .venv/bin/activate
python -m pip install --quiet --disable-pip-version-check "${TORCH:-torch==2.13.0}"
python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
