# The version is that of the C interface. As with SameMajorVersion of CMake's write_basic_package_version_file, one that is
# asked for must be of the same major version and no newer, and both ends of a range (CMake 3.19) of that version.
set(PACKAGE_VERSION "@version@")
set(PACKAGE_VERSION_COMPATIBLE FALSE)
if(PACKAGE_VERSION VERSION_GREATER_EQUAL PACKAGE_FIND_VERSION AND PACKAGE_FIND_VERSION_MAJOR STREQUAL "@major@")
  if(NOT PACKAGE_FIND_VERSION_RANGE)
    set(PACKAGE_VERSION_COMPATIBLE TRUE)
    if(PACKAGE_FIND_VERSION STREQUAL PACKAGE_VERSION)
      set(PACKAGE_VERSION_EXACT TRUE)
    endif()
  elseif(PACKAGE_FIND_VERSION_RANGE_MAX STREQUAL "INCLUDE")
    if(PACKAGE_FIND_VERSION_MAX_MAJOR STREQUAL "@major@" AND PACKAGE_VERSION VERSION_LESS_EQUAL PACKAGE_FIND_VERSION_MAX)
      set(PACKAGE_VERSION_COMPATIBLE TRUE)
    endif()
  elseif(PACKAGE_FIND_VERSION_MAX VERSION_LESS_EQUAL "@next@" AND PACKAGE_VERSION VERSION_LESS PACKAGE_FIND_VERSION_MAX)
    set(PACKAGE_VERSION_COMPATIBLE TRUE)
  endif()
endif()

# Code for another processor is of no use, whatever its version.
if(CMAKE_SYSTEM_PROCESSOR AND NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(@processors@)$")
  set(PACKAGE_VERSION "@version@ (@arch@)")
  set(PACKAGE_VERSION_UNSUITABLE TRUE)
endif()
# So is code for musl in a program with glibc, as far as CMake tells that by its name for the system.
if("@libc@" STREQUAL "musl" AND CMAKE_LIBRARY_ARCHITECTURE MATCHES "-gnu$")
  set(PACKAGE_VERSION "@version@ (@arch@, musl)")
  set(PACKAGE_VERSION_UNSUITABLE TRUE)
endif()
