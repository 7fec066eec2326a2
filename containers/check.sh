#!/bin/bash
# Build containers/Dockerfile and train in the image, as root, where there is neither a container
# runtime nor a registry. The base is Debian in place of the image of PyTorch.
#
#     containers/check.sh [OPTIONS OF buildah build]...
#
# Options are such as --volume=/etc/ssl/certs:/etc/ssl/certs:ro. TORCH_WHEEL names a wheel of torch that
# the base gets; without one, pip installs torch with CUDA, which takes 25 GB in $TMPDIR and 10 minutes.
# It needs Debian's packages buildah, crun and mmdebstrap.
set -euo pipefail

for program in buildah crun mmdebstrap; do
    if ! command -v "$program" > /dev/null; then
        echo "containers/check.sh needs Debian's package $program" >&2
        exit 2
    fi
done
root=$(cd -- "$(dirname -- "$0")/.." && pwd)
work=$(mktemp -d --tmpdir launcher-image.XXXXXX)
trap 'rm -rf -- "$work"' EXIT

# chroot isolation needs no cgroups and no network of its own; vfs needs no overlay file system.
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot REGISTRIES_CONFIG_PATH=$work/registries.conf
export TMPDIR=$work
echo 'unqualified-search-registries = []' > "$work/registries.conf"
echo '{"default": [{"type": "insecureAcceptAnything"}]}' > "$work/policy.json"
images=(buildah --root "$work/images" --runroot "$work/run")

mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3-venv bookworm "$work/base.tar"
mkdir "$work/base"
mv "$work/base.tar" "$work/base"
cat > "$work/base/Dockerfile" <<'EOF'
FROM scratch
ADD base.tar /
RUN python3 -m venv /opt/python
ENV PATH=/opt/python/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
EOF
if [ -n "${TORCH_WHEEL:-}" ]; then
    cp -- "$TORCH_WHEEL" "$work/base"
    echo 'RUN --mount=type=bind,target=/mnt pip install --no-cache-dir /mnt/*.whl' >> "$work/base/Dockerfile"
fi
"${images[@]}" build --signature-policy "$work/policy.json" --quiet --tag localhost/base "$@" \
    "$work/base"
"${images[@]}" build --signature-policy "$work/policy.json" --build-arg BASE=localhost/base \
    --file "$root/containers/Dockerfile" --ignorefile "$root/containers/Dockerfile.dockerignore" \
    --tag localhost/train:1.0 "$@" "$root"

container=$("${images[@]}" from --signature-policy "$work/policy.json" localhost/train:1.0)
"${images[@]}" run "$container" -- launcher run digits -n 2 device=cpu steps=20 --out /tmp/run
"${images[@]}" run "$container" -- launcher resume /tmp/run steps=24 -n 1
