"""Packs and backbones: formats, the Hub, model cards, publishing, conversion."""
