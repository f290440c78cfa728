# The GPU image. Never built in CI, which has no container engine: build it once before you rely on it.
#
#   docker build -t svite_scale .
#   docker run --gpus all --shm-size 16g -v /path/to/imagenet:/data:ro -v "$PWD/runs:/home/svite/svite_scale/runs" \
#       svite_scale launch/train.py --config configs/deit_base_s70.yaml data.train='/data/train-*.tar' data.val='/data/val-*.tar'
#
# The mounted runs folder must be writable for user 10001. For several nodes: --entrypoint torchrun.

# The CUDA release of torch 2.15's wheels, with nvcc and headers, because DeepSpeed compiles ops where it runs.
ARG CUDA_IMAGE=nvidia/cuda:13.2.1-devel-ubuntu24.04
FROM ${CUDA_IMAGE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 svite

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /home/svite/svite_scale

# The dependencies come before the sources, so that a change of code doesn't install them again: an editable install of
# an empty package of the same name finds the real one once it is copied.
COPY pyproject.toml setup.cfg constraints.txt LICENSE ./
RUN mkdir svite_scale \
    && touch svite_scale/__init__.py README.md \
    && python3 -m venv /opt/venv \
    && pip install --no-cache-dir -c constraints.txt -e ".[quickstart]"

COPY . .
RUN install -d -o svite -g svite data runs

USER svite
ENTRYPOINT ["deepspeed"]
CMD ["--help"]
