"""Configs loaded, checked and re-pointed; tables written three ways; files written whole."""
