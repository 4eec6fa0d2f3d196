# shellcheck shell=bash disable=SC2034 # some variables are for the scripts that source this
# What the scripts in launch/ share. Sourced, not run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$(realpath -m "${VENV:-$root/.venv}")
export VENV
export PATH="$VENV/bin:$PATH"
# Ranks share the cores of this machine with each other and with their own worker threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

die() {
    printf 'launch/%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

can_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

# need_packages PACKAGE...: installs Debian packages as root, otherwise says which ones to install.
need_packages() {
    [ $# -gt 0 ] || return 0
    if can_install; then
        echo "installing: $*"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
    else
        die "missing: $* (Debian, Ubuntu: sudo apt install $*; elsewhere the packages of that purpose)"
    fi
}

# select_mpi: sets mpi_kind (mpich or openmpi) and mpirun_cmd from $MPIRUN (default: the mpirun of the venv), and
# makes mpi4py load the libmpi that belongs to it.
select_mpi() {
    local mpirun prefix
    mpirun=$(command -v -- "${MPIRUN:-mpirun}") || die "no ${MPIRUN:-mpirun}: run launch/setup, or set MPIRUN=path"
    case $("$mpirun" --version 2>&1) in
    *"Open MPI"* | *OpenRTE*)
        mpi_kind=openmpi
        mpirun_cmd=("$mpirun" --allow-run-as-root --oversubscribe --bind-to none)
        prefix=$(dirname "$(dirname "$mpirun")")
        if [ -e "$prefix/lib/libmpi.so.40" ]; then
            export MPI4PY_LIBMPI=${MPI4PY_LIBMPI:-$prefix/lib/libmpi.so.40}
        else
            export MPI4PY_LIBMPI=${MPI4PY_LIBMPI:-libmpi.so.40}
        fi
        ;;
    *HYDRA*)
        mpi_kind=mpich
        mpirun_cmd=("$mpirun")
        ;;
    *) die "$mpirun is neither MPICH's mpirun nor Open MPI's" ;;
    esac
}
