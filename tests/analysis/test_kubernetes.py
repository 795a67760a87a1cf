"""The objects of a Kubernetes cluster against Kubernetes' and the operator's own schemas; there is no cluster here."""

import copy
import json
from importlib.resources import files

import jsonschema
import kubernetes_validate
import pytest
import yaml
from referencing import Registry, Resource

from millpond.analysis.kubernetes import deployed, manifests
from millpond.store.cluster import Kubernetes, TlsFiles
from millpond.store.errors import ClusterUnavailable

KUBERNETES = "1.36"
OPERATOR = files("dask_kubernetes") / "operator/customresources"
FULL = Kubernetes(
    workers=8, minimum=2, memory="16GiB", threads=4, gpus=1, image="registry.vault/millpond-worker:0.1",
    tls=TlsFiles(ca="ca", cert="cert", key="key"), tls_secret="dask-tls", namespace="vault",
    environment_secret="lake", service_account="dask", node_selector={"zone": "a"},
)  # fmt: skip


def by_kind(settings):
    return {one["kind"]: one for one in manifests(settings, "millpond-x")}


def operator_schema(kind):
    """The CRD's schema, its references to Kubernetes' own types resolved by the newer, strict ones."""

    def resolve(value):
        if isinstance(value, list):
            return [resolve(one) for one in value]
        if not isinstance(value, dict):
            return value
        name = value.get("$ref", "").rpartition("/")[2]
        if name.startswith("dask."):
            return resolve(templates[name])
        if name:
            return {"$ref": f"https://kubernetes.io/api/_definitions.json#/$defs/{name}"}
        return {key: resolve(one) for key, one in value.items()}

    templates = yaml.safe_load((OPERATOR / "templates.yaml").read_text())["definitions"]
    definition = yaml.safe_load((OPERATOR / f"{kind.lower()}.yaml").read_text())
    [version] = definition["spec"]["versions"]
    return definition["spec"], version["name"], resolve(version["schema"]["openAPIV3Schema"])


def check_operator_object(one):
    spec, version, schema = operator_schema(one["kind"])
    assert one["apiVersion"] == f"{spec['group']}/{version}"
    folder = files("kubernetes_validate") / f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict"
    core = Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    jsonschema.Draft202012Validator(schema, registry=core @ Registry()).validate(one)


@pytest.mark.parametrize(
    "settings", [FULL, FULL.model_copy(update={"minimum": None, "gpus": 0, "environment_secret": None})]
)
def test_objects_satisfy_the_operator_and_what_it_makes_of_them_kubernetes(settings):
    from dask_kubernetes.operator.controller import controller

    found = by_kind(settings)
    assert set(found) == {"NetworkPolicy", "DaskCluster"} | ({"DaskAutoscaler"} if settings.minimum else set())
    kubernetes_validate.validate(found["NetworkPolicy"], KUBERNETES, strict=True)
    for kind in set(found) - {"NetworkPolicy"}:
        check_operator_object(found[kind])
    cluster = copy.deepcopy(found["DaskCluster"]["spec"])
    scheduler, worker = cluster["scheduler"], cluster["worker"]
    made = [
        controller.build_scheduler_deployment_spec(
            "millpond-x", scheduler["spec"], {}, scheduler["metadata"]["labels"]
        ),
        controller.build_scheduler_service_spec("millpond-x", scheduler["service"], {}, {}),
        controller.build_worker_deployment_spec(
            "g", "vault", "millpond-x", "u", worker["spec"], {}, worker["metadata"]["labels"]
        ),
    ]
    for one in made:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    pods = [made[0]["spec"]["template"], made[2]["spec"]["template"]]
    wanted = found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items()
    assert all(wanted <= pod["metadata"]["labels"].items() for pod in pods)  # the policy holds for both
    assert made[1]["spec"]["selector"].items() <= pods[0]["metadata"]["labels"].items()
    worker_container = pods[1]["spec"]["containers"][0]
    service = f"tls://{made[1]['metadata']['name']}.vault.svc:8786"
    assert service in worker_container["args"]
    assert worker_container["resources"]["limits"].get("nvidia.com/gpu") == ("1" if settings.gpus else None)
    assert worker_container["resources"]["limits"]["memory"] == str(16 << 30)
    assert found["DaskCluster"]["spec"]["worker"]["replicas"] == (2 if settings.minimum else 8)


def test_the_schemas_find_what_is_wrong():
    cluster = by_kind(FULL)["DaskCluster"]
    cluster["spec"]["worker"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(jsonschema.ValidationError, match="imagePullPolice"):
        check_operator_object(cluster)
    policy = by_kind(FULL)["NetworkPolicy"]
    policy["spec"]["ingress"][0]["ports"][0]["port"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(policy, KUBERNETES, strict=True)


def test_programs_understand_their_arguments():
    """What the pods run, as far as the commands' own parsers go."""
    from distributed.cli import dask_scheduler, dask_worker

    cluster = by_kind(FULL)["DaskCluster"]["spec"]
    for kind, command in (("scheduler", dask_scheduler.main), ("worker", dask_worker.main)):
        program, name, *arguments = cluster[kind]["spec"]["containers"][0]["args"]
        assert (program, name) == ("dask", kind)
        with pytest.MonkeyPatch.context() as patch:
            for parameter in command.params:  # the certificates are the pods'
                patch.setattr(parameter.type, "exists", False, raising=False)
            found = command.make_context(name, arguments).params
        assert found["protocol"] == "tls"
        assert found["tls_key"] == "/etc/millpond/tls/tls.key"
    assert found["resources"] == "GPU=1"
    assert found["nthreads"] == 4


def test_without_a_cluster_it_says_what_to_check(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ClusterUnavailable, match="kubectl's context"), deployed(FULL):
        pass
