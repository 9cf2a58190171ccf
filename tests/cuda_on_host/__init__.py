"""Runs CUDA kernels on the CPU: a fiber for each CUDA thread, seeded schedules, and checks of every memory access.

build.py compiles csrc/cuda/*.cu with g++ into a library; runtime.h says what the machine does.
"""
