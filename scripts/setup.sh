# Sourced by try.sh and test.sh: a virtual environment in .venv with this project and the extras named in $1.
#
# PYTHON  the interpreter to start from (python3);  TORCH  what to ask pip for (torch==2.13.0)

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
. .venv/bin/activate
# pip looks at an installation for seconds, at each call, that has nothing to add.
wanted="${TORCH:-torch==2.13.0} .[$1] $(cksum < pyproject.toml)"
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    python -m pip install --quiet --disable-pip-version-check "${TORCH:-torch==2.13.0}"
    python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
    echo "$wanted" > .venv/installed
fi
