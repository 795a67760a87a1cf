# The gateway, its executor, JupyterHub and the egress meter: one image, a container and a user each.
# Build from the repository's root: docker build -f examples/deploy/hub.Dockerfile -t millpond-hub .
FROM python:3.11-slim-bookworm AS build
WORKDIR /build
COPY tools/locks tools/locks
RUN python -m venv /opt/millpond \
    && for extra in hub s3 gateway; do \
         /opt/millpond/bin/pip install --no-cache-dir --require-hashes -r "tools/locks/${extra}.txt" || exit 1; \
       done
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY capture capture
COPY store store
COPY analysis analysis
COPY hub hub
RUN /opt/millpond/bin/pip install --no-cache-dir --no-deps .

# the meter imports nothing of ours and nothing that is installed
FROM python:3.11-slim-bookworm AS meter
COPY hub/meter.py /usr/local/lib/meter.py
RUN install --directory --owner 20003 --group 20003 --mode 700 /ledger
USER 20003:20003
ENTRYPOINT ["python", "-I", "/usr/local/lib/meter.py"]

FROM python:3.11-slim-bookworm AS hub
RUN useradd --uid 20000 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin vault \
    && useradd --uid 20002 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin hub \
    && install --directory --owner 20000 --group 20000 /lake /state /run/millpond \
    && install --directory --owner 20002 --group 20002 /srv/hub
COPY --from=build /opt/millpond /opt/millpond
ENV PATH=/opt/millpond/bin:$PATH \
    OMP_NUM_THREADS=1 \
    DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=true
USER 20000:20000
CMD ["millpond", "--help"]
