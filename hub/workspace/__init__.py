"""The workspace: JupyterHub notebooks that can use everything and take nothing. docs/workspace.md says what is promised."""
