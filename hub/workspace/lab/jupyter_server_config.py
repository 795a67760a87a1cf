"""Trusted configuration of every notebook server, read-only in the workspace; lockdown.py checks that it was read."""

from millpond.hub.workspace.lockdown import WorkspaceAuthorizer

c = get_config()  # type: ignore[name-defined]  # noqa: F821
c.ServerApp.authorizer_class = WorkspaceAuthorizer
c.ServerApp.terminals_enabled = False
c.ServerApp.quit_button = False
c.ServerApp.jpserver_extensions = {
    "jupyterlab": True,
    "millpond.hub.workspace.lockdown": True,
    "jupyterlab_jupytext": False,
    "jupyter_lsp": False,
    "jupyter_server_terminals": False,
    "notebook": False,
    "notebook_shim": False,
    "nbclassic": False,
}
c.ContentsManager.files_handler_class = None  # no GET /files
c.FileContentsManager.files_handler_class = None
c.ContentsManager.allow_hidden = False
c.LabApp.extension_manager = "readonly"
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.MappingKernelManager.cull_idle_timeout = 4 * 3600
c.ZMQChannelsWebsocketConnection.iopub_data_rate_limit = 2_000_000
