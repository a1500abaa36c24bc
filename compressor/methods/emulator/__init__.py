"""Offsite-Tuning: see `method`."""

from compressor.methods.emulator.method import Emulator

PASS = Emulator
