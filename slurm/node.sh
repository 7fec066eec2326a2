# The first process of a virtual node: give it what is its own, and run its slurmd. See local.py.
#
#     sh node.sh FOLDER NAME GPUS COMMAND...
folder=$1 name=$2 gpus=$3
shift 3
set -e

# GPUs: a /dev with everything that the machine's has, except that NVIDIA's files are the node's.
if [ "$gpus" -gt 0 ]; then
    mkdir -p "$folder/dev.$name"
    mount -t tmpfs dev "$folder/dev.$name"
    for path in /dev/*; do
        copy=$folder/dev.$name/${path#/dev/}
        case $path in /dev/nvidia*) continue ;; esac
        if [ -L "$path" ]; then
            cp -P "$path" "$copy"
        elif [ -d "$path" ]; then
            mkdir "$copy"
            mount --rbind "$path" "$copy"
        else
            touch "$copy"
            mount --bind "$path" "$copy"
        fi
    done
    number=0
    while [ "$number" -lt "$gpus" ]; do
        mknod "$folder/dev.$name/nvidia$number" c 1 3
        number=$((number + 1))
    done
    mount --rbind "$folder/dev.$name" /dev
fi

mount --bind "$folder/hosts.$name" /etc/hosts
mount -t tmpfs shm /dev/shm
hostname "$name"

# The shell stays, because the first process of the namespace must reap orphaned processes.
set +e
"$@" &
wait $!
exit $?
