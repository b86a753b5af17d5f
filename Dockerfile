# One file for every variant. The gateway adds Python and its own folder to an image of llama.cpp.
#
#   docker build -t llama-gguf-inference .                                   NVIDIA
#   docker build -t llama-gguf-inference:cpu --build-arg VARIANT=server .    no GPU
#   docker build … --build-arg VARIANT=server-rocm | server-vulkan | server-intel | server-cuda13
#   docker build … --build-arg BASE_IMAGE=any.registry/llama-server:tag      Debian or Ubuntu, /app/llama-server in it
#
# For amd64 and arm64, if llama.cpp publishes both (server, server-cuda, server-vulkan):
#   docker buildx build --platform linux/amd64,linux/arm64 …
#
# The tag is pinned here only. A tag can be moved, so build a release from the digest that this prints:
#   docker buildx imagetools inspect ghcr.io/ggml-org/llama.cpp:server-cuda-b11434 --format '{{.Manifest.Digest}}'
#   docker build --build-arg BASE_IMAGE=ghcr.io/ggml-org/llama.cpp@sha256:… …
ARG LLAMA_BUILD=b11434
ARG VARIANT=server-cuda
ARG BASE_IMAGE=ghcr.io/ggml-org/llama.cpp:${VARIANT}-${LLAMA_BUILD}
FROM ${BASE_IMAGE}

USER 0:0

# Python comes from the distribution, as do its security updates. There is no pip, and nothing for it to install.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
    && python3 -c 'import sqlite3, ssl, sys; sys.exit(sys.version_info < (3, 10))'

COPY VERSION /opt/llama-gguf-inference/VERSION
COPY scripts /opt/llama-gguf-inference/scripts

# Compiled here, because the root filesystem may be read-only later; the start is faster. Bytecode is matched to its source
# by hash, because image builders change the times of files. The owner of /data becomes the owner of a new volume there.
ARG RUN_AS=1000:1000
RUN chmod 755 /opt/llama-gguf-inference/scripts/start.sh \
    && python3 -m compileall -q --invalidation-mode checked-hash /opt/llama-gguf-inference/scripts \
    && mkdir -p /data \
    && chown "$RUN_AS" /data

# The base images set it to 0.0.0.0. Here llama-server listens on loopback only, behind the gateway.
ENV LLAMA_ARG_HOST=

# Numeric, so that Kubernetes can verify that it is not root. DATA_DIR is not set: the platform's volume is found at boot.
USER ${RUN_AS}
WORKDIR /data
EXPOSE 8000 8001

# Only 200 is healthy. While the model loads (204), the container counts as starting: failures within the start period do
# not count until the first success. After that, a dead backend (503) or no response counts.
HEALTHCHECK --interval=10s --timeout=5s --retries=3 --start-period=24h \
    CMD ["python3", "-Sc", "import os, socket; e = os.environ.get; h = e('HOST') or '0.0.0.0'; s = socket.create_connection(({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(h, h), int(e('PORT_HEALTH') or 8001)), 4); s.sendall(b'GET /ready HTTP/1.0\\r\\n\\r\\n'); raise SystemExit(not s.recv(64).startswith(b'HTTP/1.1 200 '))"]

ENTRYPOINT ["/opt/llama-gguf-inference/scripts/start.sh"]

ARG BASE_IMAGE
ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="llama-gguf-inference" \
      org.opencontainers.image.description="llama-server behind a gateway with keys, a fair queue, metrics and truthful probes" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
