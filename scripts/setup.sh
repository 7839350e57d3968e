# Sourced by demo.sh and test.sh: a .venv with what scripts/constraints.txt pins. A second run installs nothing.
# The caller stays where it stands: ${at} leads to the project, and is empty when that is here.
at="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/"
[ "$at" = "$PWD/" ] && at=
python="${at}.venv/bin/python"
stamp="${at}.venv/.installed"
wanted="$(cat "${at}pyproject.toml" "${at}scripts/constraints.txt" | cksum)"

# install ARGUMENTS…: pip, whose words are shown only when it fails.
install() {
    "$python" -m pip install --disable-pip-version-check -c "${at}scripts/constraints.txt" "$@" \
        >>"${at}.venv/install.log" 2>&1 && return
    cat "${at}.venv/install.log" >&2
    echo "error: pip failed, as it says above; run this again when that is mended" >&2
    exit 1
}

if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    echo "1. environment: .venv is ready"
else
    echo "1. environment: torch and a few small packages are installed into .venv, once. That takes some minutes with"
    echo "   torch for CPUs (0.2 GB to load), and longer where pip's index has only the one with CUDA (some GB)."
    began=$SECONDS
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv "${at}.venv" || exit 1
    : >"${at}.venv/install.log"
    # --no-build-isolation: with it, the build's own environment would fetch packages that nothing pins
    install setuptools
    install --no-build-isolation -e "${at:-.}[test]"
    echo "$wanted" >"$stamp"
    echo "   done in $((SECONDS - began)) s"
fi
