"""The arithmetic of number formats: from a float weight and a spec to a QTensor."""
