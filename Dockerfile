# headstart as a container image. Targets: cpu (the default) and cuda.
#
#   docker build --build-arg TORCH_INDEX=<address of PyTorch's CPU wheel index> -t headstart .
#   docker build --target cuda -t headstart:cuda .
#
# PyPI's torch for Linux on x86-64 is a CUDA build of several GB, so the cpu target asks for the
# "+cpu" build of the pinned version by name and stops where there is none. PyTorch's install page
# names the index. Without TORCH_INDEX, pip's own configuration has to supply that build.
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
ARG TORCH_INDEX=
RUN torch="$(grep -E '^torch==' constraints.txt)+cpu" \
    && pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$torch" \
    || { echo "error: pip could not install $torch; if there is no such version where pip looks," \
              "pass the address of PyTorch's CPU wheel index as --build-arg TORCH_INDEX=..." >&2; \
         exit 1; }
COPY . .
RUN pip install -c constraints.txt .

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
RUN pip install -c constraints.txt torch cmake ninja nanobind packaging psutil scikit-build-core setuptools wheel
COPY . .
RUN pip install -c constraints.txt --no-build-isolation ".[cuda]"

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
