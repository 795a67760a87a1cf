"""What people run and look at: today the demo (`demo.py`) and the page it writes (`report.py`).

The gateway, its quotas and JupyterHub will live here; none of that exists yet.
"""
