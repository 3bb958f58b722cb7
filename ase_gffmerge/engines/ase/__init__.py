"""The ASE calculator and what it needs: arguments, results, batches, and the plug-in that registers it with ASE."""
