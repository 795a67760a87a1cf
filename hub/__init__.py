"""What people run and look at: the demo (`demo.py`), its page (`report.py`), and the gate on what leaves (`release.py`).

The gateway's service and JupyterHub will stand on the gate; they do not exist yet.
"""
