# headstart as a container image. Targets: cpu (the default) and cuda.
#
#   docker build -t headstart .
#   docker build --target cuda -t headstart:cuda .
#
# deploy/install.py says where the cpu target's torch comes from. TORCH_INDEX: an index with CPU
# builds, where neither pip's configuration nor PyTorch's own index is to be used.
#
# BASE may be any Debian or Ubuntu with Python 3.11 or later, its headers and its venv module.
ARG BASE=python:3.11-slim-bookworm
ARG CUDA_VERSION=12.8.1

# --- cpu -----------------------------------------------------------------------------------------
FROM ${BASE} AS builder
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/headstart
ENV PATH=/opt/headstart/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt ./
COPY deploy/install.py deploy/
ARG TORCH_INDEX=
RUN python deploy/install.py --torch-only
COPY . .
# Compiled here, since the image's user cannot write beside the sources.
RUN python deploy/install.py --copy --extras otel && python -m compileall -qq -j 0 /opt/headstart/lib

FROM ${BASE} AS cpu
RUN useradd --uid 10001 --user-group --create-home --shell /usr/sbin/nologin headstart \
    && install -d -o headstart -g headstart /var/lib/headstart
COPY --from=builder /opt/headstart /opt/headstart
ENV PATH=/opt/headstart/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HEADSTART_HOME=/var/lib/headstart \
    HF_HOME=/var/lib/headstart/huggingface
USER headstart
WORKDIR /home/headstart
VOLUME /var/lib/headstart
EXPOSE 8000
# The first start downloads and converts the model: the start period allows for it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["headstart"]
CMD ["serve", "smollm2-135m", "--host", "0.0.0.0"]

# --- cuda ----------------------------------------------------------------------------------------
# flash-attn is compiled against the torch that is installed (hence no build isolation), which needs
# nvcc and takes long; MAX_JOBS bounds the memory it takes.
FROM nvidia/cuda:${CUDA_VERSION}-devel-ubuntu24.04 AS cuda-builder
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/headstart
ARG MAX_JOBS=4
ENV PATH=/opt/headstart/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt ./
COPY deploy/install.py deploy/
RUN python deploy/install.py --cuda --torch-only
RUN pip install -c constraints.txt cmake ninja nanobind packaging psutil scikit-build-core setuptools wheel
COPY . .
RUN pip install -c constraints.txt --no-build-isolation ".[cuda,flash-attn,otel]" \
    && python -m compileall -qq -j 0 /opt/headstart/lib

# Triton compiles its launchers at run time: gcc and Python's headers stay in the image.
FROM nvidia/cuda:${CUDA_VERSION}-runtime-ubuntu24.04 AS cuda
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --create-home --shell /usr/sbin/nologin headstart \
    && install -d -o headstart -g headstart /var/lib/headstart
COPY --from=cuda-builder /opt/headstart /opt/headstart
ENV PATH=/opt/headstart/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HEADSTART_HOME=/var/lib/headstart \
    HF_HOME=/var/lib/headstart/huggingface
USER headstart
WORKDIR /home/headstart
VOLUME /var/lib/headstart
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["headstart"]
CMD ["serve", "smollm2-135m", "--host", "0.0.0.0"]

# Last, so that a build without --target makes the cpu image.
FROM cpu AS default
