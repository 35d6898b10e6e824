#!/bin/bash
# Makes this process a host of its own and runs a command there:
#   node_shell.sh FOLDER HOST SHARED... -- COMMAND...
# Called inside the host's network namespace and fresh UTS and mount namespaces. A compute node has a
# /tmp and /dev/shm of its own; of the real /tmp it sees the shared folders alone.
set -euo pipefail
folder=$1 host=$2
shift 2
shared=("$folder")
while [[ $1 != -- ]]; do
  shared+=("$1")
  shift
done
shift
hostname "$host"
mount --bind "$folder/hosts" /etc/hosts
if [[ $host == node* ]]; then
  mount -t tmpfs -o mode=1777 none /dev/shm
  mount --rbind /tmp /mnt
  mount -t tmpfs -o mode=1777 none /tmp
  for path in "${shared[@]}"; do
    [[ $path == /tmp/* ]] || continue
    mkdir -p "$path"
    mount --rbind "/mnt/${path#/tmp/}" "$path"
  done
  umount -l /mnt
fi
exec "$@"
