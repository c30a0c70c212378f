"""The manifest for KServe has only fields that KServe and Kubernetes know, with their types, and fits what is packaged."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

TRITON, DIRECT = (Path(__file__).parents[2] / "examples" / f"kserve-{name}.yaml" for name in ("triton", "serve"))
KNOWN = Path(__file__).with_name("kserve_fields.json")
ROOT = "V1beta1InferenceService"


def documents():
    return [yaml.safe_load(manifest.read_text(encoding="utf-8")) for manifest in (TRITON, DIRECT)]


def test_every_field_is_known_and_has_its_type():
    fields = json.loads(KNOWN.read_text(encoding="utf-8"))["fields"]
    for document in documents():
        require(document, ROOT, fields, document["metadata"]["name"])


def test_unknown_fields_and_wrong_types_are_found():
    fields = json.loads(KNOWN.read_text(encoding="utf-8"))["fields"]
    for change, place in (({"minReplica": 1}, "minReplica"), ({"minReplicas": "1"}, "minReplicas")):
        document = documents()[0]
        document["spec"]["predictor"] |= change
        with pytest.raises(AssertionError, match=place):
            require(document, ROOT, fields, "net")


def test_the_names_of_fields_are_those_of_the_library():
    """Run by `make test-kserve`, in an environment of its own: KServe does not go with the pins of the other tests."""
    models = pytest.importorskip("kserve.models")
    kubernetes = pytest.importorskip("kubernetes.client.models")
    known = json.loads(KNOWN.read_text(encoding="utf-8"))
    for name, fields in known["fields"].items():
        kind = getattr(models, name, None) or getattr(kubernetes, name)
        assert {kind.attribute_map[key]: type_ for key, type_ in kind.openapi_types.items()} == fields, name


def test_the_manifest_serves_what_is_packaged(cli, small_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(small_path, "model.onnx")
    assert small_path == tmp_path / "dense.onnx"
    command = next(line for line in TRITON.read_text(encoding="utf-8").splitlines() if "tensorrail package" in line)
    code, _, err = cli(*shlex.split(command.lstrip("# "))[1:])
    assert code == 0, err
    repository, _ = documents()
    assert Path(repository["spec"]["predictor"]["model"]["storageUri"]).name == "repository"
    assert (tmp_path / "repository" / repository["metadata"]["name"] / "config.pbtxt").is_file()


def test_the_container_listens_where_it_is_asked(cli):
    _, direct = documents()
    (container,) = direct["spec"]["predictor"]["containers"]
    options = dict(zip(container["args"][1::2], container["args"][2::2], strict=True))
    port = int(options["--port"])
    assert port == container["ports"][0]["containerPort"] == container["readinessProbe"]["httpGet"]["port"]
    assert options["--name"] == direct["metadata"]["name"]
    assert container["command"] == ["tensorrail", "serve"]
    code, printed, _ = cli("serve", "--help")
    assert code == 0
    assert all(option in printed for option in options)


def require(value, kind, fields, place):
    """Raise `AssertionError` with the place of a field that `kind` does not have, or that has another type."""
    if kind.lower().startswith("list["):
        assert isinstance(value, list), f"{place}: expected a list"
        for number, one in enumerate(value):
            require(one, kind[5:-1], fields, f"{place}[{number}]")
    elif kind.lower().startswith(("dict(", "dict[")):
        assert isinstance(value, dict), f"{place}: expected a mapping"
        for key, one in value.items():
            require(one, kind[5:-1].split(", ")[1], fields, f"{place}.{key}")
    elif kind in fields:
        assert isinstance(value, dict), f"{place}: expected a {kind}"
        for key, one in value.items():
            assert key in fields[kind], f"{place}.{key}: {kind} has no such field"
            require(one, fields[kind][key], fields, f"{place}.{key}")
    else:
        plain = {"str": str, "int": int, "bool": bool, "ResourceQuantity": str, "object": (str, int)}
        assert kind in plain, f"{place}: the fields of {kind} are not in {KNOWN.name}; add them"
        assert isinstance(value, plain[kind]), f"{place}: expected {kind}, got {value!r}"
        assert not (plain[kind] is int and isinstance(value, bool)), f"{place}: expected {kind}, got {value!r}"
