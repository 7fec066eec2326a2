#!/bin/bash
# Takes /dev/shm away in this mount namespace, as on a node that is not set up: `launcher doctor`
# finds it. The argument is a folder to work in.
set -e
mkdir "$1"
mount -t tmpfs none "$1"
for name in null zero random urandom tty; do
    touch "$1/$name"
    mount --bind "/dev/$name" "$1/$name"
done
ln -s /proc/self/fd "$1/fd"
mount --rbind "$1" /dev
