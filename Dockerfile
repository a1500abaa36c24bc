# The CPU image: compress run recipe.yaml in a container.
#
#   docker build -t compress .
#   docker run --rm -v "$PWD:/data" compress run recipe.yaml
#
# PyPI's torch for Linux brings CUDA libraries of several GB. TORCH_ARGS takes it from PyTorch's own
# index of CPU wheels instead: --build-arg TORCH_ARGS="--index-url <that index>".
FROM python:3.12-slim AS build

ARG TORCH_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

RUN python -m venv /opt/compress
ENV PATH=/opt/compress/bin:$PATH
RUN pip install ${TORCH_ARGS} "torch>=2.8"

WORKDIR /src
COPY pyproject.toml README.md ./
COPY compressor ./compressor
COPY kernels ./kernels
COPY calibration ./calibration
COPY recipes ./recipes
RUN pip install .

FROM python:3.12-slim

# Triton's interpreter and compiler want a C compiler when a kernel is first built.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
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
