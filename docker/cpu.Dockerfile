# Base image for docker/Dockerfile on machines without a GPU: Python and the CPU build of torch.
# BASE must have python3 with pip and venv.
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
ARG TORCH=torch<2.14
ARG PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu"
COPY docker/check_torch.py docker/wheel[s] /tmp/wheels/
# Install into a separate folder, so that the final image has no wheels and caches. pip refuses to install into the Python of
# a Linux distribution unless PIP_BREAK_SYSTEM_PACKAGES is set.
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
        --no-warn-script-location --root /made --find-links /tmp/wheels ${PIP_ARGS} "${TORCH}"

FROM ${BASE}
COPY --from=build /made /
