"""The real model that the project is tried with: fetched, converted, built and measured."""
