"""The models that are merged: found, opened by their headers, read tensor by tensor."""
