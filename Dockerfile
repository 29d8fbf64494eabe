# JupyterLab with the notebooks, its work kept in a folder that user 1000 can write:
#   docker build -t igd .
#   docker run --rm -p 8888:8888 -v "$HOME/.cache/igd:/home/igd/.cache/igd" igd
# On GPUs: docker build --build-arg IGD_TORCH_INDEX= -t igd . and docker run --gpus all ...
FROM python:3.12-slim-bookworm

# Debian's mirrors keep one version of a package: a pinned one would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 igd
USER 1000
WORKDIR /home/igd/igd_lib
COPY --chown=igd:igd . .
ARG IGD_TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV IGD_TORCH_INDEX=${IGD_TORCH_INDEX} PIP_NO_CACHE_DIR=1
RUN make setup
EXPOSE 8888
CMD [".venv/bin/jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "notebooks"]
