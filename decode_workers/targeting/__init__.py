"""Constrained beam search over a catalogue's trie, and PTPV: pure, driven by the engine."""
