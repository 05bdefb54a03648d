"""Attention kernels in Pallas, one a file: `splash` for whole rows on TPUs, `slots` for one token
a row over a cache on GPUs.
"""
