# The project on one of NVIDIA's images, whose torch, megatron-core, Transformer Engine and apex stay
# as they are: docker/vendor.py pins them before the install and compares them after it.
#
#   docker build --build-arg BASE_IMAGE=nvcr.io/nvidia/nemo:26.06 -t opcd-nemo .
#   enroot import -o opcd-nemo.sqsh dockerd://opcd-nemo          # then OPCD_IMAGE=.../opcd-nemo.sqsh
#
# base image (as its release notes have it)   torch    megatron-core  TE    CUDA
# nvcr.io/nvidia/nemo:26.06                   2.12     0.18.0         2.16  13.2
# nvcr.io/nvidia/pytorch:26.06-py3            2.13a0   ours           2.16  13.3   about 25 GB, not 77
#
# `2.13.0a0` of pytorch:26.06-py3 satisfies `torch>=2.9`; it would not satisfy `torch>=2.13`.
# The steps are tested on a stand-in base (make image-test); none of these images was at hand.
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:26.06
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="opcd-nemo" \
      org.opencontainers.image.description="On-policy context distillation on NeMo and Megatron" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# an environment above the vendor's, which it sees wherever the vendor's Python has it
WORKDIR /opt/opcd
COPY docker/vendor.py docker/
RUN python3 -m venv --system-site-packages venv \
 && python3 docker/vendor.py paths >"$(venv/bin/python docker/vendor.py purelib)/vendor.pth" \
 && venv/bin/python docker/vendor.py record >vendor.json

# what the project needs, without the project: a change of code leaves this layer
COPY pyproject.toml constraints.txt ./
RUN venv/bin/python docker/vendor.py constraints vendor.json constraints.txt >image-constraints.txt \
 && venv/bin/python docker/vendor.py requirements pyproject.toml >requirements.txt \
 && PIP_CONSTRAINT=image-constraints.txt venv/bin/python -m pip install --no-cache-dir \
      --requirement requirements.txt \
 && venv/bin/python docker/vendor.py check vendor.json

COPY . .
ENV PATH=/opt/opcd/venv/bin:$PATH \
    PIP_CONSTRAINT=/opt/opcd/image-constraints.txt \
    PYTHONDONTWRITEBYTECODE=1
RUN python -m pip install --no-cache-dir --no-deps --editable . \
 && python docker/vendor.py check vendor.json

ARG USER_ID=10001
RUN useradd --create-home --no-log-init --uid "${USER_ID}" opcd \
 && mkdir -p /workspace/runs && chown -R opcd /workspace/runs
USER ${USER_ID}
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m \
  CMD ["opcd", "doctor", "doctor.environment_only=true", "parallel=single", "exp_manager.exp_dir=/workspace/runs"]
