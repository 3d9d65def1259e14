"""How several processes hold and train one model: data, pieces (ZeRO), tensor, and what else the grid has."""
