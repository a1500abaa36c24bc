# The CPU image: compress run recipe.yaml in a container.
#
#   docker build -t compress .
#   docker run --rm -v "$PWD:/data" compress run recipe.yaml
#
# PyPI's torch for Linux brings CUDA libraries of several GB, so TORCH_ARGS takes it from PyTorch's
# own index of CPU builds. It can name another index, a release or a folder of wheels:
# --build-arg TORCH_ARGS="torch==2.13.0 --find-links /wheels".
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build

ARG TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/compress
ENV PATH=/opt/compress/bin:$PATH
RUN pip install "torch>=2.8" ${TORCH_ARGS}

WORKDIR /src
COPY pyproject.toml README.md ./
COPY compressor ./compressor
COPY kernels ./kernels
COPY calibration ./calibration
COPY recipes ./recipes
RUN pip install .

FROM ${BASE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*

COPY --from=build /opt/compress /opt/compress
ENV PATH=/opt/compress/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/.cache/huggingface \
    XDG_CACHE_HOME=/data/.cache

RUN useradd --create-home --uid 1000 compress
USER compress
WORKDIR /data

ENTRYPOINT ["compress"]
CMD ["--help"]
