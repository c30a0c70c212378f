"""Which extra of the installation brings a package that is missing."""

from __future__ import annotations

_EXTRAS = {
    "history": ("matplotlib", "ruptures"),
    "lightning": ("lightning",),
    "olive": ("olive",),
    "transformers": ("transformers",),
    "export": ("PIL", "onnx_graphsurgeon", "safetensors", "tensorly"),
    "serve": ("fastapi", "prometheus_client", "ray", "starlette", "uvicorn"),
}
_OWN = ("tensorrail", "tensorrail_exporter", "tensorrail_trainer", "tensorrail_runtime")


class MissingExtraError(ModuleNotFoundError):
    """A package of an extra is not installed; the message says which extra to install.

    Args:
        what: what needs the package, such as "this command".
        error: the error of the import that failed.

    """

    def __init__(self, what: str, error: ModuleNotFoundError) -> None:
        package, extra = missing_extra(error) or (error.name, "all")
        super().__init__(
            f"{what} needs {package}: install the extra `{extra}`, as in pip install '.[{extra}]'", name=error.name
        )


def missing_extra(error: ModuleNotFoundError) -> tuple[str, str] | None:
    """Return the package that is missing and the extra that brings it; None where it is a module of tensorrail itself."""
    package = (error.name or "").partition(".")[0]
    if package in _OWN:
        return None
    return package, next((extra for extra, packages in _EXTRAS.items() if package in packages), "train")
