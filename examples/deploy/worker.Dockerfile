# The vault's workers: Dask workers and schedulers, and with EXTRAS="capture s3" vLLM capture workers on GPUs.
# Build from the repository's root: docker build -f examples/deploy/worker.Dockerfile -t millpond-worker .
FROM python:3.11-slim-bookworm AS build
ARG EXTRAS="analysis s3"
WORKDIR /build
COPY tools/locks tools/locks
RUN python -m venv /opt/millpond \
    && for extra in ${EXTRAS}; do \
         /opt/millpond/bin/pip install --no-cache-dir --require-hashes -r "tools/locks/${extra}.txt" || exit 1; \
       done
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY capture capture
COPY store store
COPY analysis analysis
COPY hub hub
RUN /opt/millpond/bin/pip install --no-cache-dir --no-deps .

FROM python:3.11-slim-bookworm
# torch.compile of capture workers calls a C++ compiler; the version is the distribution's
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 20000 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin vault \
    && install --directory --owner 20000 --group 20000 /lake /state
COPY --from=build /opt/millpond /opt/millpond
ENV PATH=/opt/millpond/bin:$PATH \
    OMP_NUM_THREADS=1 \
    DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=true
# by number: Kubernetes' runAsNonRoot cannot look names up
USER 20000:20000
CMD ["millpond", "--help"]
