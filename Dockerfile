# lorajob as one image.
#
#   docker build -t lorajob:0.1.0 .                 for a GPU: Python 3.12, requirements.lock
#   docker build -t lorajob:0.1.0-cpu --build-arg VARIANT=cpu --build-arg BASE_IMAGE=debian:bookworm-slim .
#                                                   without one: Python 3.11, requirements-cpu.lock
#
# pip is told of a registry of your own (for the CPU image: of one that has torch's CPU builds) by
# `--secret id=pip,src=pip.conf`; nothing of it stays in the image.
#
# The base is a plain distribution, not CUDA's own image: torch's packages bring every CUDA library,
# each at the version torch was built with, and the driver's come from the host. A CUDA runtime image
# would hold them a second time, 2 GB of them, and none would be loaded.
#
# checkov:skip=CKV_DOCKER_7:the tag is in the argument
# checkov:skip=CKV_DOCKER_2:a job that ends has no health to ask for; limits.stall_minutes watches it
ARG BASE_IMAGE=ubuntu:24.04
ARG VARIANT=cuda

# --- what building and running both need
FROM ${BASE_IMAGE} AS python
ARG VARIANT
# Triton compiles a launcher for its kernels at run time: gcc with libc's and Python's headers, which
# only GPUs need. Versions are the base image's: pin that by its digest for the same packages again.
# hadolint ignore=DL3008
RUN export DEBIAN_FRONTEND=noninteractive \
    && apt-get update -q \
    && apt-get install -qy --no-install-recommends ca-certificates python3 \
    && if [ "$VARIANT" = cuda ]; then \
        apt-get install -qy --no-install-recommends gcc libc6-dev libpython3-dev \
        && find /usr/lib -name 'libpython*.a' -delete \
        && find /usr/lib* /usr/bin -name lto1 -delete -o -name '*lto-dump*' -delete; \
    fi \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/ldconfig/* /var/log/*.log /var/log/apt \
        /usr/share/doc/* /usr/share/man/*

FROM python AS build
# hadolint ignore=DL3008
RUN export DEBIAN_FRONTEND=noninteractive \
    && apt-get update -q \
    && apt-get install -qy --no-install-recommends g++ python3-venv \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /pip

# --- llama.cpp, from the pinned source by the project's own builder
FROM build AS llama
WORKDIR /src
COPY pyproject.toml requirements-cpu.lock requirements.lock ./
COPY image/packages.py image/
RUN --mount=type=cache,target=/cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    python3 image/packages.py list tools > tools.txt \
    && PIP_CACHE_DIR=/cache/pip /pip/bin/python -m pip install -q --disable-pip-version-check \
        --require-hashes --no-deps -r tools.txt
COPY entrypoint.py ./
COPY jobs jobs
# The builder keeps what it made under a key of all that went into it: when other parts of lorajob
# change, this takes a second.
RUN --mount=type=cache,target=/cache/lorajob \
    --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    export LORAJOB_CACHE=/cache/lorajob PIP_CACHE_DIR=/cache/pip \
    && /pip/bin/python entrypoint.py tools --log json \
    && mkdir -p /opt/lorajob \
    && cp -a "$(/pip/bin/python -c 'from jobs.export.llama.build import find_tools; print(find_tools())')" \
        /opt/lorajob/llama.cpp \
    # Chat templates and a server are for tests and others; symbols are for debuggers.
    && rm -rf /opt/lorajob/llama.cpp/templates /opt/lorajob/llama.cpp/llama_cpp/server \
    && strip --strip-unneeded /opt/lorajob/llama.cpp/llama_cpp/lib/*.so* \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /opt/lorajob/llama.cpp

# --- the Python packages of the lock
FROM build AS list
ARG VARIANT
WORKDIR /src
COPY pyproject.toml requirements-cpu.lock requirements.lock ./
COPY image/packages.py image/
RUN python3 image/packages.py list "$VARIANT" > image/packages.txt

FROM python AS packages
ARG VARIANT
# The shipped image goes on from here: copying a gigabyte from stage to stage would have builders
# hash it each time. So pip, and what is not wanted of the packages, has to come and go in one step.
# pip compiles to bytecode, without which a start takes 10 seconds longer on a root that is read-only.
COPY --from=list /src/image /opt/lorajob/image
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    export DEBIAN_FRONTEND=noninteractive \
    && apt-get update -q \
    && apt-get install -qy --no-install-recommends python3-venv \
    && python3 -m venv /pip \
    && python3 -m venv --without-pip /opt/lorajob/venv \
    && PIP_CACHE_DIR=/cache/pip /pip/bin/python -m pip --python /opt/lorajob/venv/bin/python install -q \
        --disable-pip-version-check --require-hashes --no-deps --only-binary :all: \
        -r /opt/lorajob/image/packages.txt \
    && site=$(/opt/lorajob/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
    && python3 /opt/lorajob/image/packages.py slim "$site" "$VARIANT" \
    && /opt/lorajob/venv/bin/python /opt/lorajob/image/packages.py verify "$site" /opt/lorajob/image/packages.txt \
    && /opt/lorajob/venv/bin/python -c 'import torch, transformers, trl, peft, bitsandbytes, datasets' \
    && apt-get purge -qy --auto-remove -o APT::AutoRemove::SuggestsImportant=false python3-venv \
    && apt-get clean \
    && rm -rf /pip /tmp/* /opt/lorajob/image/__pycache__ \
        /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/ldconfig/* /var/cache/debconf/*-old \
        /var/lib/dpkg/*-old /var/log/*.log /var/log/apt

# --- lorajob itself, and the demo, which proves a node without any network
FROM python AS app
WORKDIR /opt/lorajob
COPY --chmod=0755 entrypoint.py ./
COPY LICENSE ./
COPY examples/demo.yaml examples/demo.yaml
COPY examples/demo/base examples/demo/base
COPY examples/demo/data examples/demo/data
COPY jobs jobs
# Bytecode that is never compared with the source: file times differ between builders.
RUN sed -i -e 's#examples/demo/#/opt/lorajob/&#' -e 's#runs/published#/work/published#' examples/demo.yaml \
    && python3 -m compileall -q --invalidation-mode unchecked-hash entrypoint.py jobs

# --- what is shipped
FROM packages AS runtime
ARG VARIANT
# Ubuntu has a user 1000 of its own. Group 0 may write, for clusters that choose the user themselves.
RUN if name=$(id -nu 1000 2>/dev/null); then userdel --remove "$name"; fi \
    && useradd --uid 1000 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin lorajob \
    && install -d -o 1000 -g 0 -m 0775 /work /cache \
    && ln -s /opt/lorajob/entrypoint.py /usr/local/bin/lorajob \
    && rm -rf /var/log/*.log /etc/*-
COPY --from=llama /opt/lorajob/llama.cpp /opt/lorajob/llama.cpp
COPY --from=app /opt/lorajob /opt/lorajob

# Written are /work (runs), /cache (what can be fetched or made again) and /tmp, and nothing else: the
# root may be read-only. A GPU is asked for by `--gpus` or the device plugin; NVIDIA_VISIBLE_DEVICES
# here would give every container all of them.
ENV PATH=/opt/lorajob/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    LORAJOB_IMAGE=${VARIANT} \
    LORAJOB_WORK=/work/runs \
    LORAJOB_CACHE=/cache \
    LORAJOB_LLAMA_CPP=/opt/lorajob/llama.cpp \
    HOME=/tmp \
    USER=lorajob \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    UNSLOTH_COMPILE_LOCATION=/cache/unsloth \
    CUDA_CACHE_PATH=/cache/cuda \
    MPLCONFIGDIR=/cache/matplotlib \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
USER 1000:1000
RUN lorajob schema > /dev/null
ENTRYPOINT ["/opt/lorajob/venv/bin/python", "/opt/lorajob/entrypoint.py"]
CMD ["run"]
STOPSIGNAL SIGTERM

# Last, so that a new revision changes no layer.
ARG VERSION=0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="lorajob" \
      org.opencontainers.image.description="Fine-tune a language model as one batch job, and prove that the result works." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      dev.lorajob.variant="${VARIANT}"
