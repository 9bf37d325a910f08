# The version is that of the C interface; the one that is asked for must be its beginning.
set(PACKAGE_VERSION "@version@")
string(FIND "${PACKAGE_VERSION}." "${PACKAGE_FIND_VERSION}." @name@_at)
if(@name@_at EQUAL 0)
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
endif()
if(PACKAGE_FIND_VERSION STREQUAL PACKAGE_VERSION)
  set(PACKAGE_VERSION_EXACT TRUE)
endif()
unset(@name@_at)

# Code for another processor is of no use, whatever its version.
if(CMAKE_SYSTEM_PROCESSOR AND NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(@processors@)$")
  set(PACKAGE_VERSION "@version@ (@arch@)")
  set(PACKAGE_VERSION_UNSUITABLE TRUE)
endif()
