#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Get what the tests need.
#
#   setup-tests.sh packages          programs, from Debian, if we are root there
#   setup-tests.sh venv PYTHON DIR   a virtual environment with requirements-dev.txt
#   setup-tests.sh pythons           print the interpreters 3.8 to 3.13 found here
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1

is_debian_root() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null
}

apt_install() {
    echo "setup-tests: installing $*" >&2
    apt-get -qq -o DPkg::Lock::Timeout=300 update </dev/null >/dev/null &&
        apt-get -qq -o DPkg::Lock::Timeout=300 install --no-install-recommends -y "$@" </dev/null >/dev/null
}

packages() {
    missing=
    while read -r program package; do
        command -v "$program" >/dev/null || missing="$missing $package"
    done <<-END
	bash bash
	busybox busybox
	ceph-mon ceph-mon
	ceph-osd ceph-osd
	rbd ceph-common
	dash dash
	losetup mount
	cpio cpio
	depmod kmod
	fio fio
	make make
	mandoc mandoc
	nagios4 nagios4-core
	mkfs.btrfs btrfs-progs
	mkfs.ext4 e2fsprogs
	mkfs.vfat dosfstools
	mkfs.xfs xfsprogs
	nbd-client nbd-client
	nbdfuse nbdfuse
	nbdinfo libnbd-bin
	nbdkit nbdkit
	nbdsh python3-libnbd
	openssl openssl
	qemu-img qemu-utils
	qemu-system-x86_64 qemu-system-x86
	sfdisk fdisk
	strace strace
	systemd-analyze systemd
	systemd-nspawn systemd-container
	dbus-daemon dbus
	telnet telnet
	tmux tmux
	unshare util-linux
	END
    [ -n "$missing" ] || return 0
    if is_debian_root; then
        # shellcheck disable=SC2086  # a list
        apt_install $missing && return 0
    fi
    # No failure: the tests that need one of these say so themselves.
    echo "setup-tests: warning: missing packages:$missing" >&2
}

venv() {
    # The marker is newer than the requirements, and the interpreter still runs.
    if [ -e "$2/.ready" ] && [ -z "$(find requirements-dev.txt -newer "$2/.ready")" ] &&
        "$2/bin/python" -c 'import pytest' 2>/dev/null; then
        return 0
    fi
    echo "setup-tests: making $2 with $1" >&2
    if ! complaint=$("$1" -m venv --clear "$2" 2>&1); then
        # Debian keeps ensurepip in a package of its own.
        if ! is_debian_root || ! apt_install python3-venv || ! "$1" -m venv --clear "$2"; then
            echo "$complaint" >&2
            return 1
        fi
    fi
    "$2/bin/python" -m pip install -q -r requirements-dev.txt </dev/null
    touch "$2/.ready"
}

pythons() {
    for minor in 8 9 10 11 12 13; do
        for python in "python3.$minor" "${HOME:-/root}"/.pyenv/versions/3."$minor".*/bin/python3."$minor"; do
            # Asked, not believed: a pyenv shim can stand for a version that is not there.
            if real=$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))' 2>/dev/null); then
                echo "$real"
                break
            fi
        done
    done
}

case ${1-}:$# in
packages:1) packages ;;
venv:3) venv "$2" "$3" ;;
pythons:1) pythons ;;
*)
    echo "usage: setup-tests.sh packages | venv PYTHON DIR | pythons" >&2
    exit 1
    ;;
esac
