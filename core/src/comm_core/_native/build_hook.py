"""hatchling's build hook `comm-core`: compiles a plugin's `csrc/` into its wheel.

```toml
[build-system]
requires = ["hatchling", "comm-core[kernels]"]
build-backend = "hatchling.build"

[tool.hatch.build.hooks.comm-core]
```

hatchling finds it through the entry point of the group `hatch`; nothing else imports it.
"""

from __future__ import annotations

import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.plugin import hookimpl

from comm_core._native import toolchain
from comm_core.errors import PluginLoadError

__all__ = ["KernelsBuildHook", "hatch_register_build_hook"]


class KernelsBuildHook(BuildHookInterface[Any]):
    """A build hook that compiles if there is a compiler; otherwise the wheel is pure, and users compile the code.

    Its only option, `package`, is the import name, by default the project's name with underscores.
    """

    PLUGIN_NAME = "comm-core"

    _scratch: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tag the wheel with its platform; do nothing for an editable wheel.

        Args:
            version: hatchling's name for the kind of wheel.
            build_data: hatchling's build data, changed in place.

        Raises:
            FileNotFoundError: the project has no such package.
            PluginLoadError: there are no sources, or the compiler fails.
        """
        if self.target_name != "wheel" or version != "standard":
            return
        package = self.config.get("package", self.metadata.name.replace("-", "_"))
        sources = toolchain.find_sources(self._folder(package))
        try:
            tools = toolchain.find_tools(sources)
        except PluginLoadError as error:
            self.app.display_warning(f"{self.metadata.name}: this wheel has only sources: {error}")
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="comm-core-")
        built = toolchain.make_recipe(package, sources, tools).build(Path(self._scratch.name))
        build_data["force_include"][str(built)] = f"{package}/{toolchain.BUILT_FOLDER}/{built.name}"
        build_data["pure_python"] = False
        # This machine's platform, not manylinux: the binary's other requirements are unchecked.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002 - hatchling's
        """Remove the compiled files: the wheel has copies."""
        if self._scratch is not None:
            self._scratch.cleanup()

    def _folder(self, package: str) -> Path:
        places = [Path(self.root, "src", package), Path(self.root, package)]
        for place in places:
            if place.is_dir():
                return place
        raise FileNotFoundError(
            f"there is no package {package!r}: neither {places[0]} nor {places[1]} is a folder. Set package in "
            f"[tool.hatch.build.hooks.{self.PLUGIN_NAME}] to its name"
        )


@hookimpl
def hatch_register_build_hook() -> type[BuildHookInterface[Any]]:
    """Return the hook's class to hatchling."""
    return KernelsBuildHook
