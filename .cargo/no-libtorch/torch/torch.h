// Found only where libtorch is not: see ../../config.toml.
#error There is no libtorch where LIBTORCH points. Run `make libtorch` (with LIBTORCH unset), or set LIBTORCH to an unpacked libtorch 2.13 or to the `torch` folder of a pip-installed torch 2.13, or set LIBTORCH_USE_PYTORCH=1.
#include <see_the_error_above> // Unlike #error, this ends the compilation.
