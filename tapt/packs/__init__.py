"""Packs and backbones: formats, the Hub, model cards, publishing, conversion."""

from tapt.packs.format import list_packs as list_packs
