# Sourced by demo.sh and test.sh: a .venv with what scripts/constraints.txt pins. A second run installs nothing.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONWARNINGS="ignore:Failed to initialize NumPy"  # torch works without it, and so does this project
python="${PYTHON:-python3}"
stamp=.venv/.installed
wanted="$(cat pyproject.toml scripts/constraints.txt | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    echo "1. environment: .venv is ready"
else
    echo "1. environment: installing torch (CPU build where the index offers one) and a few small packages into .venv"
    [ -x .venv/bin/python ] || "$python" -m venv .venv || exit 1
    # --no-build-isolation: with it, the build's own environment would fetch packages that nothing pins
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt setuptools || exit 1
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt \
        --no-build-isolation -e ".[test]" || exit 1
    echo "$wanted" > "$stamp"
fi
