# A researcher's notebook server: the client and JupyterLab, no PyTorch, no Dask workers, no credentials.
# Build from the repository's root: docker build -f examples/deploy/notebook.Dockerfile -t millpond-notebook .
FROM python:3.11-slim-bookworm AS build
WORKDIR /build
COPY tools/locks tools/locks
RUN python -m venv /opt/millpond \
    && /opt/millpond/bin/pip install --no-cache-dir --require-hashes -r tools/locks/notebook.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY capture capture
COPY store store
COPY analysis analysis
COPY hub hub
RUN /opt/millpond/bin/pip install --no-cache-dir --no-deps .

FROM python:3.11-slim-bookworm
RUN useradd --uid 20010 --create-home --shell /bin/bash researcher
COPY --from=build /opt/millpond /opt/millpond
ENV PATH=/opt/millpond/bin:$PATH
WORKDIR /home/researcher
USER 20010:20010
CMD ["jupyterhub-singleuser", "--ip=0.0.0.0", "--ServerApp.terminals_enabled=False"]
