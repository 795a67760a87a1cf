"""Capture: reading chosen activations of chosen requests inside vLLM, and streaming them into a lake.

Importing this package imports neither vLLM nor torch; `millpond.capture.job` runs whole jobs and
`millpond.capture.worker` is the vLLM worker class.
"""
