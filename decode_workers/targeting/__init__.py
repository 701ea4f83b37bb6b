"""Constrained beam search over a catalogue's trie, and its verification at once: pure, driven by the engine."""
