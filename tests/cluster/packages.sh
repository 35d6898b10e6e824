#!/bin/bash
# Installs Debian packages for a test, without starting what they bring: packages.sh PROGRAM PACKAGE...
# Does nothing where the program is there, or where this user cannot install: the tests then say so.
set -euo pipefail
program=$1
shift
if command -v "$program" >/dev/null || ((EUID)) || ! command -v apt-get >/dev/null; then exit 0; fi
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy" # no service starts
  chmod +x "$policy"
fi
apt-get -qq update
apt-get -qq install -y --no-install-recommends "$@"
