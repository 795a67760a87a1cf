"""A cluster of the dask-kubernetes operator: its manifests, and putting them into force for as long as a `with` lasts.

`dask_kubernetes.operator.KubeCluster` reaches its scheduler without TLS, so the objects are made here and the client is
an ordinary one. The operator scales through the scheduler's web API, which a NetworkPolicy opens to it alone.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from millpond.store.cluster import Kubernetes
from millpond.store.errors import ClusterUnavailable

_CERTIFICATES = "/etc/millpond/tls"
_SCHEDULER_PORT, _WEB_PORT = 8786, 8787
_WORKER_PORTS = 9000, 9015
_API_ROUTES = ["distributed.http.scheduler.api", "distributed.http.health"]


def manifests(settings: Kubernetes, name: str) -> list[dict[str, Any]]:
    """The objects of the cluster `name`: a NetworkPolicy, the DaskCluster, and a DaskAutoscaler if it scales."""
    objects = [_network_policy(settings, name), _dask_cluster(settings, name)]
    if settings.minimum is not None:
        spec = {"cluster": name, "minimum": settings.minimum, "maximum": settings.workers}
        objects.append(_object("kubernetes.dask.org/v1", "DaskAutoscaler", settings, name, spec))
    return objects


def _object(version: str, kind: str, settings: Kubernetes, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": settings.namespace, "labels": {"app.kubernetes.io/part-of": "millpond"}}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}


def _dask_cluster(settings: Kubernetes, name: str) -> dict[str, Any]:
    import dask.utils

    memory = int(dask.utils.parse_bytes(settings.memory))
    limits: dict[str, str] = {"cpu": str(settings.threads), "memory": str(memory)}
    if settings.gpus:
        limits["nvidia.com/gpu"] = str(settings.gpus)
    worker = [
        "dask", "worker", f"tls://{name}-scheduler.{settings.namespace}.svc:{_SCHEDULER_PORT}", "--protocol", "tls",
        "--name", "$(DASK_WORKER_NAME)", "--nthreads", str(settings.threads), "--memory-limit", str(memory),
        "--worker-port", ":".join(map(str, _WORKER_PORTS)), "--no-dashboard", *_tls_arguments(),
    ]  # fmt: skip
    if settings.gpus:
        worker += ["--resources", f"GPU={settings.gpus}"]
    scheduler = ["dask", "scheduler", "--protocol", "tls", "--host", "0.0.0.0", *_tls_arguments()]  # noqa: S104 - a pod
    probe = {"httpGet": {"port": "http-dashboard", "path": "/health"}, "periodSeconds": 5}
    ports = {"tcp-comm": _SCHEDULER_PORT, "http-dashboard": _WEB_PORT}
    routes = [{"name": "DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES", "value": repr(_API_ROUTES)}]
    small = {"cpu": "1", "memory": "2Gi"}
    return _object("kubernetes.dask.org/v1", "DaskCluster", settings, name, {
        "worker": {
            "replicas": settings.fewest,
            "metadata": {"labels": {"app": "dask-worker"}},
            "spec": _pod(settings, _container("worker", settings, worker, limits, [], {})),
        },
        "scheduler": {
            "metadata": {"labels": {"app": "dask-scheduler"}},
            "spec": _pod(
                settings,
                _container("scheduler", settings, scheduler, small, routes, ports)
                | {"readinessProbe": probe, "livenessProbe": probe | {"initialDelaySeconds": 15}},
            ),
            "service": {
                "type": "ClusterIP",
                "selector": {"dask.org/cluster-name": name, "dask.org/component": "scheduler"},
                "ports": [
                    {"name": port, "protocol": "TCP", "port": number, "targetPort": port}
                    for port, number in ports.items()
                ],
            },
        },
    })  # fmt: skip


def _tls_arguments() -> list[str]:
    files = {"ca-file": "ca.crt", "cert": "tls.crt", "key": "tls.key"}
    return [part for name, file in files.items() for part in (f"--tls-{name}", f"{_CERTIFICATES}/{file}")]


def _container(
    name: str,
    settings: Kubernetes,
    arguments: list[str],
    limits: dict[str, str],
    environment: list[dict[str, str]],
    ports: dict[str, int],
) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": name,
        "image": settings.image,
        "args": arguments,
        "env": [{"name": "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION", "value": "true"}, *environment],
        "resources": {"requests": limits, "limits": limits},
        "ports": [{"name": port, "containerPort": number, "protocol": "TCP"} for port, number in ports.items()],
        "volumeMounts": [
            {"name": "certificates", "mountPath": _CERTIFICATES, "readOnly": True},
            {"name": "scratch", "mountPath": "/tmp"},  # noqa: S108 - of the pod
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        },
    }  # fmt: skip
    if settings.environment_secret:
        container["envFrom"] = [{"secretRef": {"name": settings.environment_secret}}]
    return container


def _pod(settings: Kubernetes, container: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "containers": [container],
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "volumes": [
            {"name": "certificates", "secret": {"secretName": settings.tls_secret}},
            {"name": "scratch", "emptyDir": {}},
        ],
    }
    if settings.service_account:
        pod["serviceAccountName"] = settings.service_account
    if settings.node_selector:
        pod["nodeSelector"] = settings.node_selector
    return pod


def _network_policy(settings: Kubernetes, name: str) -> dict[str, Any]:
    """The gateway and the cluster's own pods reach its TLS ports, the operator its web port, and nobody else anything.

    What the pods may reach is for the vault's own policies to say, by their labels `app`.
    """
    operator = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": settings.operator_namespace}}}
    own = {"dask.org/cluster-name": name}
    tls = [
        {"protocol": "TCP", "port": _SCHEDULER_PORT},
        {"protocol": "TCP", "port": _WORKER_PORTS[0], "endPort": _WORKER_PORTS[1]},
    ]
    callers = [{"podSelector": {"matchLabels": labels}} for labels in ({"app": "gateway"}, own)]
    spec = {
        "podSelector": {"matchLabels": own},
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": callers, "ports": tls},
            {"from": [operator], "ports": [{"protocol": "TCP", "port": _WEB_PORT}]},
        ],
    }
    return _object("networking.k8s.io/v1", "NetworkPolicy", settings, name, spec)


@contextmanager
def deployed(settings: Kubernetes) -> Iterator[str]:
    """Create the objects, give the scheduler's address, and delete them at the end.

    Raises:
        ClusterUnavailable: Kubernetes cannot be reached, refuses an object, or has no operator.
    """
    try:
        import kr8s
        from kr8s.objects import object_from_spec
    except ImportError as error:
        raise ClusterUnavailable(
            "kind kubernetes needs dask-kubernetes; run: pip install 'millpond[kubernetes]'"
        ) from error
    name = f"millpond-{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        try:
            api = kr8s.api(namespace=settings.namespace)
            for manifest in manifests(settings, name):
                one = object_from_spec(manifest, api=api, allow_unknown_type=True)
                one.create()
                stack.callback(one.delete)
        except Exception as error:  # kr8s, httpx and OSError, by what is wrong
            raise ClusterUnavailable(
                f"the kubernetes cluster did not start ({type(error).__name__}: {error}); check kubectl's context, your "
                f"rights in {settings.namespace}, and that the Dask operator is installed"
            ) from error
        yield f"tls://{name}-scheduler.{settings.namespace}.svc:{_SCHEDULER_PORT}"
