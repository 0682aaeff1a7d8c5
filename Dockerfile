# The image in which Luthier runs, for NVIDIA GPUs or for the CPU:
#
#   docker build -t luthier:cuda .
#   docker build -t luthier:cpu --build-arg VARIANT=cpu .
#
# Versions are those of constraints.txt, which the tests run with. PyTorch's wheels bring CUDA's libraries along, so that
# both variants begin from the same small Python; the driver comes from the node. What changes seldom lies below: a new
# version of Luthier is one small layer.
ARG VARIANT=cuda

FROM python:3.12.12-slim-bookworm AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1
# Triton compiles what starts its kernels. Its version is that of the distribution, which mends it within a release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# A number, so that Kubernetes can see that it is not root.
RUN groupadd --gid 1000 luthier \
    && useradd --uid 1000 --gid 1000 --create-home luthier \
    && install --directory --owner=luthier --group=luthier /work
WORKDIR /build
COPY constraints.txt ./

FROM base AS torch-cuda
RUN pip install --no-cache-dir --constraint constraints.txt torch
# What NVIDIA's container runtime gives to the container: the driver for computing, and nvidia-smi.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM base AS torch-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Alone: what it needs comes from the usual index, with everything else.
RUN pip install --no-cache-dir --constraint constraints.txt --no-deps --index-url "${TORCH_INDEX}" torch

# hadolint ignore=DL3006
FROM torch-${VARIANT} AS luthier
# Extras of pyproject.toml. These are in constraints.txt with all that they need; others, such as wandb, come in the
# version of the day.
ARG EXTRAS=bitsandbytes,optimizers,sentencepiece,tensorboard
WORKDIR /build
# What Luthier needs, before Luthier itself: for a package that is empty but for its version.
COPY pyproject.toml ./
COPY luthier/__init__.py luthier/
RUN touch README.md LICENSE \
    && pip install --no-cache-dir --constraint constraints.txt hatchling \
    && pip install --no-cache-dir --constraint constraints.txt --no-build-isolation ".[${EXTRAS}]"
COPY README.md LICENSE ./
COPY luthier luthier
RUN pip install --no-cache-dir --no-build-isolation --no-deps --force-reinstall .

USER 1000:1000
WORKDIR /work
ENTRYPOINT ["luthier"]
CMD ["--help"]
